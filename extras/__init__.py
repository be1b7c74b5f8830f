"""What goes beyond the specification: README.md says what each module is for."""
