"""What nodes of a graph *do*, found by running them on numbers (`evaluate`): regions around a scan, cross scans and merges."""
