"""Objectives that let a student follow a teacher."""
