"""What every HTTP server of the package needs: an address, who may come in, bodies within bounds."""
