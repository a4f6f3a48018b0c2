"""The small parts that attention, ffn and model share."""
