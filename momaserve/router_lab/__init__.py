"""What causal routing costs a checkpoint: `momaserve router-report`. Changes no checkpoint."""
