"""The learner: optimizer, jitted training steps, and the object that holds their state."""
