"""A loaded model, the same model without some of its layers, and what it writes."""
