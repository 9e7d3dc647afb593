"""Which values a tensor may take: fitting centers, rounding to them."""
