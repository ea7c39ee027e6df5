CREATE TABLE outbox_message (
    position BIGINT NOT NULL AUTO_INCREMENT, 
    id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    payload LONGBLOB, 
    content_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    headers MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    created_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    CONSTRAINT outbox_message_pkey PRIMARY KEY (position), 
    CONSTRAINT outbox_message_bucket_check CHECK (bucket BETWEEN 0 AND 63)
);

CREATE TABLE outbox_scheduled (
    id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    payload LONGBLOB, 
    content_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    headers MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    created_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    deliver_at DATETIME(6) NOT NULL, 
    CONSTRAINT outbox_scheduled_pkey PRIMARY KEY (id), 
    CONSTRAINT outbox_scheduled_bucket_check CHECK (bucket BETWEEN 0 AND 63)
);

CREATE INDEX outbox_scheduled_deliver_at_idx ON outbox_scheduled (deliver_at);

CREATE TABLE outbox_parked (
    position BIGINT NOT NULL, 
    id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    payload LONGBLOB, 
    content_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    headers MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    created_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    `role` VARCHAR(8) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    attempts INTEGER NOT NULL DEFAULT 0, 
    next_attempt_at DATETIME(6), 
    first_failed_at DATETIME(6), 
    last_failed_at DATETIME(6), 
    last_error MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    CONSTRAINT outbox_parked_pkey PRIMARY KEY (position)
);

CREATE INDEX outbox_parked_due_idx ON outbox_parked (`role`, next_attempt_at);

CREATE INDEX outbox_parked_key_idx ON outbox_parked (topic, `key`, position);

CREATE TABLE outbox_dead_letter (
    id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    consumer VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    message_id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    cycle INTEGER NOT NULL, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `partition` INTEGER, 
    `offset` BIGINT, 
    bucket SMALLINT, 
    `key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    raw_key LONGBLOB, 
    type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    payload LONGBLOB, 
    content_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    headers MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    created_at DATETIME(6), 
    reason VARCHAR(32) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    exception_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    exception_message MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    stack MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    fingerprint VARCHAR(16) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    attempts INTEGER NOT NULL, 
    first_failed_at DATETIME(6), 
    dead_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    app_version VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    state VARCHAR(16) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    closed_at DATETIME(6), 
    edited_from CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci, 
    CONSTRAINT outbox_dead_letter_pkey PRIMARY KEY (id), 
    CONSTRAINT outbox_dead_letter_key UNIQUE (consumer, message_id, cycle)
);

CREATE INDEX outbox_dead_letter_state_idx ON outbox_dead_letter (state, fingerprint, dead_at);

CREATE TABLE outbox_audit (
    id BIGINT NOT NULL AUTO_INCREMENT, 
    at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    action VARCHAR(32) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    who VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    why MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    target MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    count INTEGER NOT NULL, 
    CONSTRAINT outbox_audit_pkey PRIMARY KEY (id)
);

CREATE TABLE outbox_inbox (
    consumer VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    message_id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    outcome VARCHAR(8) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    cycle INTEGER NOT NULL DEFAULT 0, 
    processed_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    CONSTRAINT outbox_inbox_pkey PRIMARY KEY (consumer, message_id)
);

CREATE INDEX outbox_inbox_processed_at_idx ON outbox_inbox (processed_at);

CREATE TABLE outbox_attempt (
    consumer VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    message_id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    cycle INTEGER NOT NULL DEFAULT 0, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `partition` INTEGER, 
    `offset` BIGINT, 
    `key` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    sequence BIGINT, 
    attempts INTEGER NOT NULL DEFAULT 0, 
    state VARCHAR(16) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    next_attempt_at DATETIME(6), 
    first_failed_at DATETIME(6), 
    last_failed_at DATETIME(6), 
    last_error MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    payload LONGBLOB, 
    content_type VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    headers MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    created_at DATETIME(6), 
    CONSTRAINT outbox_attempt_pkey PRIMARY KEY (consumer, message_id)
);

CREATE INDEX outbox_attempt_due_idx ON outbox_attempt (consumer, state, next_attempt_at);

CREATE INDEX outbox_attempt_sequence_idx ON outbox_attempt (consumer, `key`, sequence);

CREATE TABLE outbox_sent (
    position BIGINT NOT NULL, 
    id CHAR(36) CHARACTER SET ascii COLLATE ascii_general_ci NOT NULL, 
    topic VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    `partition` INTEGER, 
    `offset` BIGINT, 
    sent_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    CONSTRAINT outbox_sent_pkey PRIMARY KEY (position)
);

CREATE INDEX outbox_sent_id_idx ON outbox_sent (id);

CREATE INDEX outbox_sent_sent_at_idx ON outbox_sent (sent_at);

CREATE TABLE outbox_lease (
    bucket SMALLINT NOT NULL, 
    owner VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    epoch BIGINT NOT NULL DEFAULT 0, 
    expires_at DATETIME(6), 
    transactional_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    fence_pending MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    CONSTRAINT outbox_lease_pkey PRIMARY KEY (bucket)
);

CREATE TABLE outbox_relay (
    owner VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    host VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    version VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    started_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    heartbeat_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    state MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin, 
    CONSTRAINT outbox_relay_pkey PRIMARY KEY (owner)
);

CREATE TABLE outbox_checkpoint (
    name VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    value MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin NOT NULL, 
    updated_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6)), 
    CONSTRAINT outbox_checkpoint_pkey PRIMARY KEY (name)
);

INSERT INTO outbox_checkpoint (name, value) VALUES ('outbox_id', uuid()), ('buckets', '64');

INSERT INTO outbox_lease (bucket) VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9), (10), (11), (12), (13), (14), (15), (16), (17), (18), (19), (20), (21), (22), (23), (24), (25), (26), (27), (28), (29), (30), (31), (32), (33), (34), (35), (36), (37), (38), (39), (40), (41), (42), (43), (44), (45), (46), (47), (48), (49), (50), (51), (52), (53), (54), (55), (56), (57), (58), (59), (60), (61), (62), (63);

DELETE FROM outbox_checkpoint WHERE outbox_checkpoint.name = 'schema_version';

INSERT INTO outbox_checkpoint (name, value) VALUES ('schema_version', '1');
