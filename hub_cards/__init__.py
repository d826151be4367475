"""What the Hub shows: card templates and the code that renders them."""
