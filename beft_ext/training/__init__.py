"""Act: what trains, the loss, the optimizer, the steps and the loop."""
