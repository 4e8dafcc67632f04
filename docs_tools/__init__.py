"""What makes the documentation: its figures, its reference pages, and how links leave the site. No part of sfumato."""
