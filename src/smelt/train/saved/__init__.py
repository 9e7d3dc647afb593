"""What operations keep for their backward pass, stored in few bits in between."""
