"""When a model may stop looping: rules compared, and plans searched for."""
