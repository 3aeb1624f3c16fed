"""Numbers: metrics as pure functions, and commands that make the project's figures."""
