"""How a bundle answers: the engine, dynamic batching, the protocol, the server and its metrics. Never imports torch."""
