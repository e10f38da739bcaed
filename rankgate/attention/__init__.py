"""Attention to selected tokens: `select` says which, `attend` attends to them, `heads` chooses for each head."""
