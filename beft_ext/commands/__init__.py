"""What only the command line needs: the verbs and what lies under them."""
