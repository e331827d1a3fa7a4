"""HTTP: the REST protocol, pictures and the pages beside them."""
