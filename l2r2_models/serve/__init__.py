"""An HTTP server for predictions: uploads are checked against limits, decoded, and classified in batches across connections."""
