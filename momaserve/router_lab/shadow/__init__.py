"""The lab on live traffic: a sample of what a server answered, scored beside it."""
