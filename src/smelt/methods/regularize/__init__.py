"""Terms of the training loss that make weights cheap."""
