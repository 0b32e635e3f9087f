"""What a layout will cost before it is run: memory, traffic, time. Arithmetic over a configuration, without torch."""
