"""What removing layers costs, measured: the engine, the evaluators on top, the aggregation of outcomes."""
