"""What a saved log says: offline findings and the report. Knows no torch."""
