"""How the processes meet, where ``torch.distributed`` is initialized."""
