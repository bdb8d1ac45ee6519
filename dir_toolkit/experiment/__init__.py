"""Experiments: data sets, training, results and networks of the recipes. The rest of the package never imports it."""
