"""What runs on a site, without PyTorch: photos, feature cache, local training, MQTT client, tagging."""
