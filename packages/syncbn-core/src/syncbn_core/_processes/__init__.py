"""How processes synchronize, where ``torch.distributed`` is initialized."""
