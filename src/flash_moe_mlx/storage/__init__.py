"""Storage: files, I/O threads, the store that reads expert records into memory, and the disk probe."""
