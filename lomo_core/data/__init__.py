"""From a file of JSON lines to batches: formats (torch-free), chat templates and loss masks, order and padding."""
