"""Which request is computed when: models, queue, batches and deadlines."""
