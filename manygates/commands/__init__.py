"""The commands, a module per family: each declares its arguments beside what it does."""
