"""The paper's questions (arXiv:2605.14075) asked of one model: which metric knows which layers matter, and how well."""
