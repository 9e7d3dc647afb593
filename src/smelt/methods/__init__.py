"""The methods: one file each, named by its path ('share.kmeans'), found by its shelf.  None imports another."""
