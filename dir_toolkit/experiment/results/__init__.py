"""Results of finished runs: one labelled dataset, tables, figures and a report."""
