"""A shop that takes orders over HTTP and charges for them in another process."""
