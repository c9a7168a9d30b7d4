"""What people read: the model card in every exported folder."""
