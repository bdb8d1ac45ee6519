"""From finished runs to one labelled result, its tables, figures and report."""
