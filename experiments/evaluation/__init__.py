"""What an exported model is good for: downstream tasks by the standard harness, and the prompt templates of its uses."""
