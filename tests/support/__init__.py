"""What tests stand on: a scripted upstream, a raw client, the real process, certificates. Nothing here imports the relay."""
