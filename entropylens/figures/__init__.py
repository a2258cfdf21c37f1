"""Tables in, Plotly figures out: shared by the report and the dashboard. Knows no torch."""
