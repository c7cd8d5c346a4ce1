"""Reading: files, I/O threads, the store that reads expert records into memory, the disk probe."""
