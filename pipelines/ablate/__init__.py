"""`nvila ablate prune`: whether a pruning method pays, by training on what each method keeps."""
