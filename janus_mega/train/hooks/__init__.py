"""What happens beside training, one concern a file; `build` lists them."""
