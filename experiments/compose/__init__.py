"""Methods one after another: the same model fused, distilled, given spans, tuned by others, trained on several tasks."""
