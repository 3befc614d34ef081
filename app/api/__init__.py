"""HTTP: paths, bodies and headers to values, values and errors to answers."""
