"""What an operator sees and sets: settings, keys, TLS, log, metrics, traces."""
