"""What goes beyond the specification: README.md in this folder says what each module is for."""
