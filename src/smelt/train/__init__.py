"""The training seam, the loop on top of it, and how it resumes."""
