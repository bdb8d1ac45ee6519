"""The wing for experiments: data sets, training, results and the networks of the recipes. The core never imports it."""
