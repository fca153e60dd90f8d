"""Report on the experts of a trained model, explain their effect, add and remove experts."""
