"""Why one result differs from another: per class, by image, in pictures, and whether it is more than luck."""
