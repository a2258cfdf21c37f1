"""Where rows live: the run directory, its writer, reader and queries. Knows no torch."""
